"""The demo: a real model tuned on real text in a real cluster, told in a person's words."""
