"""What a recipe asks for, before anything starts."""
