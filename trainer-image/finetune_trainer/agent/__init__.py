"""The agent: PID 1 of the trainer pod. Light: it never imports torch.

It fetches inputs, restores a checkpoint, starts one worker per process and watches them, stores checkpoints,
publishes the artifact and says why the attempt ended. `attempt.py` is the main flow.
"""
