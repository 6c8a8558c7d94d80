"use strict";
// What a pointer (or the keyboard's focus) brings up, at once and unclipped. Without this script the browser's own titles do.
if (!document.tlJetsTips) {
  document.tlJetsTips = true;
  let tip = null, over = null;
  const hide = () => { if (tip) tip.remove(); tip = over = null; };
  const put = () => {
    const at = over.getBoundingClientRect(), size = tip.getBoundingClientRect();
    const below = at.bottom + 6, above = at.top - size.height - 6;
    tip.style.left = `${Math.max(4, Math.min(at.left, innerWidth - size.width - 4))}px`;
    tip.style.top = `${below + size.height > innerHeight && above > 0 ? above : below}px`;
  };
  const show = event => {
    const place = event.target instanceof Element ? event.target.closest(".tl-jets [title], .tl-jets [data-tip]") : null;
    hide();
    if (!place) return;
    if (place.title) { place.dataset.tip = place.title; place.removeAttribute("title"); }
    tip = document.createElement("div");
    tip.className = "tip"; tip.setAttribute("role", "tooltip"); tip.textContent = place.dataset.tip;
    place.closest(".tl-jets").append(tip);
    over = place;
    put();
  };
  document.addEventListener("pointerover", show);
  document.addEventListener("focusin", show);
  document.addEventListener("focusout", hide);
  document.addEventListener("scroll", () => { if (tip) put(); }, true);
  document.addEventListener("keydown", event => { if (event.key === "Escape") hide(); });
}
