"""The object store and what is kept in it: claims, fences, checkpoints, artifacts.

Light: imports no torch, and boto3 only when an s3:// address is opened. Reading order: objects (the
surface), checkpoints (what counts, how an attempt starts), writer (how a checkpoint commits).
"""
