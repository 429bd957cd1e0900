"""The search: device orders and micro-batch sizes around two integer programs."""
