// Two pictures a second of the camera, as JPEG.

import { openDevice } from "./sound.js";

const WIDTH = 640;
const INTERVAL = 500;

export class Camera {
  /** `take(url)` gets each picture as a data: URL. */
  static async open(view, take) {
    const made = new Camera();
    made.stream = await openDevice({ video: { width: WIDTH, facingMode: "environment" } });
    made.take = take;
    made.view = view;
    made.canvas = document.createElement("canvas");
    view.srcObject = made.stream;
    view.hidden = false;
    await view.play();
    made.timer = setInterval(() => made.shoot(), INTERVAL);
    return made;
  }

  /** Take a picture now. */
  shoot() {
    const { videoWidth: width, videoHeight: height } = this.view;
    if (!width) return;
    const scale = Math.min(1, WIDTH / Math.max(width, height));
    this.canvas.width = Math.round(width * scale);
    this.canvas.height = Math.round(height * scale);
    this.canvas.getContext("2d").drawImage(this.view, 0, 0, this.canvas.width, this.canvas.height);
    this.take(this.canvas.toDataURL("image/jpeg", 0.7));
  }

  close() {
    clearInterval(this.timer);
    for (const track of this.stream.getTracks()) track.stop();
    this.view.srcObject = null;
    this.view.hidden = true;
  }
}
