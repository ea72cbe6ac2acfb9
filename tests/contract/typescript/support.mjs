// What the parts of the contract share: the client under test, and commands in instances.

import assert from 'node:assert/strict';
import { on, once } from 'node:events';

import Hypeman from '@onkernel/hypeman';
import WebSocket from 'ws';

export const image = process.env.STORY_IMAGE;
export const client = new Hypeman({ timeout: 300_000 });

export async function refused(status, code, call) {
  await assert.rejects(call, (error) => {
    assert.equal(error.status, status, String(error));
    assert.equal(error.error?.code, code, JSON.stringify(error.error));
    return true;
  });
}

export async function waitFor(id, state) {
  const answer = await client.instances.wait(id, { state, timeout: '4m' });
  assert.equal(answer.state, state);
  assert.equal(answer.timed_out, false);
}

/**
 * A command in an instance. The SDK has no helper for it, so this speaks the frames of the contract through the SDK's
 * own WebSocket library, as its copy helper does.
 */
export class Session {
  output = Buffer.alloc(0);
  exitCode = undefined;

  constructor(socket) {
    this.socket = socket;
    this.messages = on(socket, 'message', { close: ['close'] });
  }

  static async start(instance, command, options = {}) {
    const url = `${client.baseURL.replace(/^http/, 'ws')}/instances/${instance}/exec`;
    const headers = { Authorization: `Bearer ${client.apiKey}` };
    const session = new Session(new WebSocket(url, { headers, maxPayload: 1 << 20 }));
    await once(session.socket, 'open');
    session.socket.send(JSON.stringify({ command, tty: false, ...options }));
    return session;
  }

  async next() {
    const { value, done } = await this.messages.next();
    assert.ok(!done, `closed without an exit code: ${this.output}`);
    const [data, isBinary] = value;
    if (isBinary) {
      this.output = Buffer.concat([this.output, data]);
    } else {
      const control = JSON.parse(data);
      assert.deepEqual(Object.keys(control), ['exitCode']);
      this.exitCode = control.exitCode;
    }
  }

  async until(text) {
    while (!this.output.includes(text)) await this.next();
  }

  async finish() {
    while (this.exitCode === undefined) await this.next();
    assert.ok((await this.messages.next()).done, 'the exit code is the last word');
    return this;
  }
}

export async function exec(instance, command, options) {
  return (await Session.start(instance, command, options)).finish();
}
