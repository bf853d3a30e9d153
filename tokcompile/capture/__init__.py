"""Bring what Dynamo or ``torch.export`` captured into one form: pre-dispatch ATen with symbolic sizes."""
