"""The operator: turns FineTuneJobs into preflights, plans and attempts.

Reading order: reconcile (the main flow), decide (what should happen, pure), render (what children look like, pure),
observe, apply and status (the API), watch and queue (what wakes a job), main (how it all starts).
"""
