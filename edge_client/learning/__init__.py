"""What a device makes of a task: how it trains, what it keeps to itself, what it finds when it evaluates."""
