"""Plan a recipe's GPU memory: simulate one training step on tensors that have shapes but no storage."""

from .plan_report import PlanReport, make_plan_report
from .planner import Plan, Planner, plan_memory

__all__ = ["Plan", "PlanReport", "Planner", "make_plan_report", "plan_memory"]
