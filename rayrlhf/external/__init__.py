"""What is not of this package, and scores for it: a user's Python functions, HTTP endpoints."""
