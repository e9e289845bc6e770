"""Block-sparse softmax attention, its backward and its tangent (SLA's sparse branch, method.md sections 3 and 4)."""
