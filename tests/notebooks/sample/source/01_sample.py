# %% [markdown]
# # A sample chapter
#
# It exercises the machinery: a figure, a panel, an exercise.

# %%
import matplotlib.pyplot as plt
import torch

from longseq_tutorial.classroom import Panel, Slider, fmt, show, use_style
from longseq_tutorial.classroom.exercises import check

use_style()

# %%
fig, ax = plt.subplots()
ax.plot([0, 1, 4, 9], label="square")
ax.set(xlabel="length (steps)", ylabel="pairs")
ax.legend()
show(fig, "Pairs against length: the curve rises as the square, from 0 at length 0 to 9 at length 3.")


# %%
class Decay(Panel):
    title = "How fast an average forgets"
    controls = {"alpha": Slider("alpha, weight of the new input", 0.01, 0.99, value=0.3)}

    def figure(self, alpha):
        fig, ax = plt.subplots()
        ax.plot([alpha * (1 - alpha) ** lag for lag in range(20)])
        ax.set(xlabel="lag (steps)", ylabel="weight")
        return fig

    def describe(self, alpha):
        return f"With alpha = {fmt(alpha)} the weight at lag 5 is {fmt(alpha * (1 - alpha) ** 5)}."


panel = Decay()
panel

# %%
print(panel.set(alpha=0.9).say())

# %% [markdown]
# ### Exercise 1 · Double it
#
# Difficulty: ●○○ · Importance: ●●● · 5 minutes
#
# Write it.
#
# <details><summary>Hint</summary>
#
# Twice.
#
# </details>


# %%
def double(x):
    """x (length,) -> 2x."""
    # BEGIN SOLUTION "your turn: return twice x"
    return 2 * x
    # END SOLUTION


# %%
check(double, lambda x: 2 * x, name="double", cases=[(torch.arange(3.0, dtype=torch.float64),)])
