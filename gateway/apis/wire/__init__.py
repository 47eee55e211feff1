"""What the APIs share: strict bodies, errors, server-sent events, and answers that end when the client leaves."""
