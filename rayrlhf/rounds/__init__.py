"""Iterated RLHF (InstructGPT section 3.1, Llama 2 section 3.2.3): `rounds` of a recipe.

run.py        the loop: sample, judge, refit the reward model, go on with PPO
folders.py    a round is the recipe itself, in a folder of its own
collect.py    answers of the current policy, and what the judge says of them
accuracy.py   reward models before and after a round, on answers that neither has seen
"""
