"""Training and evaluation: one LightningModule and one LightningDataModule per task."""
