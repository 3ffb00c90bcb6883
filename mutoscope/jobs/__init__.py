"""The domain of the service: durable jobs, credits, batches, webhooks. No HTTP words, no torch.

Read in this order: `model.py` (states), `spec.py` (what can be asked), `service.py` (submit, cancel, delete),
`queue.py` (claim, progress, finish), `ledger.py` (money).
"""
