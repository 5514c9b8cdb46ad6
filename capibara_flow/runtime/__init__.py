"""Where hops of the map become subscriptions, and answers become fenced output."""
