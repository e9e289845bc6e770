"""Linear attention and its tangent (SLA's linear branch, method.md section 3, step 5)."""
