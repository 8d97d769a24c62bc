"""Search for losses: who proposes them, how they are judged, and what is kept."""
