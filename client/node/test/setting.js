/**
 * Return an environment variable that a test needs: `setting('ADDRESS')` is OPTSERVE_ADDRESS, that of a server.
 *
 * @param {string} name
 */
export function setting(name) {
  const value = process.env[`OPTSERVE_${name}`];
  if (value === undefined) throw new Error(`OPTSERVE_${name} must be set`);
  return value;
}
