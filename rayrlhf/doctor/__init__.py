"""`rayrlhf doctor`: what on each node of a cluster would stop a run, before it starts.

`facts` are measured on every node at once, each with a deadline; `checks` are pure functions of
the facts of all nodes, and every `Finding` that is not ok says what to do.
"""
