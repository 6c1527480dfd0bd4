"""The public functions, one a command: `attack`, `certify`, `corruptions`, `settle`, `audit`, `table`, `figure`, `compare`.

Each takes defences and images as objects or by name, measures or reads, writes what the command writes, and returns a
value that prints as the command does. `import rush_bench` re-exports them.
"""
