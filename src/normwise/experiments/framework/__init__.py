"""What every study stands on: workers, finished runs kept on disk, progress, interruption, timing."""
