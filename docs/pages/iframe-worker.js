// The search of the site runs in a worker, which browsers refuse to pages that were opened from a disk. There it runs in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.waiting = [];
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.frame.srcdoc = "<!DOCTYPE html><title>search</title>";
      this.frame.addEventListener("load", () => {
        const inside = this.frame.contentWindow, script = inside.document.createElement("script");
        inside.postMessage = data => {
          const event = new MessageEvent("message", { data });
          this.dispatchEvent(event);
          if (this.onmessage) this.onmessage(event);
        };
        script.src = url;
        script.addEventListener("load", () => {
          this.inside = inside;
          this.waiting.forEach(data => this.postMessage(data));
        });
        inside.document.head.append(script);
      }, { once: true });
      document.head.append(this.frame);
    }
    postMessage(data) {
      if (this.inside) this.inside.dispatchEvent(new this.inside.MessageEvent("message", { data }));
      else this.waiting.push(data);
    }
    terminate() { this.frame.remove(); }
  };
}
