"""What a recipe asks for, before it starts: memory, layout, seconds, money, and Kubernetes objects.

Nothing here starts Ray or loads a model; `probe` alone imports torch.
"""
