"""Equal layers: a trace runs the code of two equal layers, and copies what they did for the rest.

layers.py decides, by layer_call.py (a call's arguments and nodes) and layer_state.py (all that its
code read); copying.py makes the nodes.
"""
