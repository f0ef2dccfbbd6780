"""What a run did and what it saves: summaries, operations, published systems, videos."""
