"""Many jobs as one: a search over ratios, budgets, rates and whatever else a job says. No torch.

contract   what a sweep asks for, checked where it enters
alike      one placement for all points
children   what a sweep knows of the jobs behind its points, and how it follows one
hosted     children that are jobs of the service, over HTTP
direct     children that the sweep runs itself, for clusters without a service
trial      what Ray Tune runs: one child, and what is seen of it
halving    ASHA, which is told after a lost driver what it has seen
tuning     Ray Tune told what to try, and asked to go on after a lost driver
outcome    figures, shares of full fine-tuning, fronts and knee of the trials; the service asks it, too
points     children as points, and their table
front      which points nothing beats, and where a front turns
drawing    the fronts as PNG and SVG
"""
