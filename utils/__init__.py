"""The small package behind the notebooks: one module, one idea, in the order data flows."""
