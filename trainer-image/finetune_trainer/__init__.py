"""The trainer: sources, data, preflight, agent, worker and checkpoint store.

Light parts (sources, data, preflight, store, agent) never import torch or transformers at module level.
"""
