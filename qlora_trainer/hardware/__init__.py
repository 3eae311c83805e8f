"""The one room that tells devices apart: device choice, memory readings, bitsandbytes."""
