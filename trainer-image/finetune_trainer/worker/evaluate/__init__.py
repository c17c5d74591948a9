"""What is measured of a model before and after: metrics, answers, predictions, benchmarks, and the gate on them."""
