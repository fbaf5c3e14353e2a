"use strict";
// Before anything is drawn: the theme the reader chose last time, where the browser keeps such things.
(() => {
  const root = document.documentElement;
  const key = "autotune-theme";
  const themes = ["light", "dark"];

  const show = (theme) => {
    if (themes.includes(theme)) root.dataset.theme = theme;
    else delete root.dataset.theme; // as the system has it
  };

  let kept = "";
  try {
    kept = localStorage.getItem(key) || "";
  } catch { /* no storage for this page: the choice holds until it is closed */ }
  show(kept);

  addEventListener("DOMContentLoaded", () => {
    const choice = document.getElementById("theme");
    if (!choice) return;
    choice.value = themes.includes(kept) ? kept : "";
    choice.addEventListener("change", () => {
      show(choice.value);
      try {
        localStorage.setItem(key, choice.value);
      } catch { /* as above */ }
    });
  });
})();
