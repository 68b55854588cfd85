"""What `quant_report.json` says, for people: records, plots, and a page of several checkpoints."""
