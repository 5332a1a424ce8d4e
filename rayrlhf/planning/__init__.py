"""What a recipe will need before it starts: memory, layout, seconds, money, and the risk of a run.

Nothing here starts Ray or loads a model; `probe` alone imports torch.
"""
