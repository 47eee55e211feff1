"""What stands between strangers and the routes: keys, limits, bounds, timeouts and the drain."""
