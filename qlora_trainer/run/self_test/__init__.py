"""What a machine really does, beside what the plan and the references say: `doctor --self-test`."""
