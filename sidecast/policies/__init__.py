"""How a prediction meets a run: the arithmetic that the hook, the service and the evaluation share."""
