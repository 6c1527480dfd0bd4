"""An attack and a defence that rush-bench finds by entry point."""
