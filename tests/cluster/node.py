from __future__ import annotations
class Node:
    COMPONENTS=()
