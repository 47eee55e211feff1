"""What one caller may take: requests and tokens a minute, and requests at one time."""
