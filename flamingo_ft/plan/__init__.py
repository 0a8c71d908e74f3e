"""How much memory a recipe needs, found by a dry run: one training step on tensors that have shapes and no content."""

from .planner import Plan, Planner, plan_memory

__all__ = ["Plan", "Planner", "plan_memory"]
