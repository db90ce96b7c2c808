"""Rule-based rewards: string rules, math-verify on top of them, a user's function, all run in killable processes."""
