"""Ray Serve applications: the page on which people rank completions and vote between models."""
