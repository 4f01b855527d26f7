// The progress page: asks how far the analysis is, and opens the page when it is done (or has failed: the page says why).
"use strict";

(() => {
  const section = document.getElementById("progress");
  const bar = document.getElementById("progress-bar");
  const text = document.getElementById("progress-text");
  const pauseMs = 400;

  async function poll() {
    let status;
    try {
      const answer = await fetch(section.dataset.statusUrl, { headers: { Accept: "application/json" } });
      if (!answer.ok) {
        window.location.reload();
        return;
      }
      status = await answer.json();
    } catch {
      text.textContent = "heapledger does not answer; trying again …";
      setTimeout(poll, 5 * pauseMs);
      return;
    }
    if (status.state === "done" || status.state === "failed") {
      window.location.reload();
      return;
    }
    bar.value = status.progress;
    text.textContent =
      status.state === "waiting"
        ? "Waiting for another analysis to end …"
        : `${Math.floor(status.progress * 100)} %, ${Math.round(status.elapsed_s)} s`;
    setTimeout(poll, pauseMs);
  }

  setTimeout(poll, pauseMs);
})();
