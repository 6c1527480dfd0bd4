"""Tables, figures and published numbers, made from records alone."""
