"""Many videos from one list of prompts: in this process, or on workers of Ray."""
