"""RLHF on Ray: from raw text to a served assistant, one recipe from laptop to cluster."""

__version__ = "0.1.0"
