"""`python -m rush_bench` is `rush-bench`."""

from rush_bench.cli import main

if __name__ == "__main__":
    main(prog_name="rush-bench")
