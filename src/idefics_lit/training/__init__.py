"""The LightningModule, and what a run needs around it: checkpoints, preemption, the run's folder."""
