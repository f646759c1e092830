"""Many jobs as one: a search over ratios, budgets, rates and whatever else a job says. No torch.

contract   what a sweep asks for, checked where it enters
front      which of its points nothing beats, and the knee among them
"""
