"""What the user asked for: YAML and overrides become one frozen, validated value. Imports no torch."""
