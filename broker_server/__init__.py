"""What runs beside the broker: select clients, aggregate their updates, publish the global model."""
